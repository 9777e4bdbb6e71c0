"""Every private or version-bound name of torch, transformers, PEFT and accelerate, in one place.

Each function here is one such thing; `tests/test_compat.py` has a canary for each, which fails with
a sentence that says what to look at. Nothing else of this library touches a private name.

what is needed                                      where                  what differs by version
--------------------------------------------------  ---------------------  -----------------------
a capture with caches and a limit of its own        dynamo.capture         torch < 2.13: (1)
a capture's caches let go with it                   caches.forget
Dynamo's settings and errors while it captures      dynamo.capturing       torch < 2.13: (2)
the backend of a torch.compile around us, by name   dynamo.outer_backend
what torch.compile(model) returns                   dynamo.is_around
the operator of a captured checkpoint, its policy   dynamo.CHECKPOINT
where the nodes of a captured graph come from       dynamo.stack_of
one function compiled, alone, or only counted       inductor.compiled
whether Inductor works for a device                 inductor.works
products of 16 bits added into float32              tensors.adds_wider     torch < 2.8: not at all
what a GraphModule keeps when it is copied          modules.keep
parameters, children and hooks of a module          modules
a callback at the end of backward; versions; norms  autograd
storages, fake tensors, trees, wrapper subclasses   tensors
a step played without memory: storages, places      stage
FSDP2's sharded and whole parameters                fsdp.twins             torch < 2.13: (3)
gradients that FSDP2 has yet to send                fsdp.waits
modules that fully_shard leaves to us               fsdp.leave_to_us
DDP around a forward, ZeRO's marks                  fsdp.ddp_around
one process of many, played without the others      world
what transformers does for reentrant checkpoints    hf.Workarounds
gradient checkpointing switched on, unwarned        hf.checkpoint_blocks   an older name before 5.23

(1) `torch.compile` has neither `recompile_limit=` nor `isolate_recompiles=`: the limit stands in a
    patched config.
(2) Dynamo logs its settings sorted, and functions in `ignore_logging_functions` cannot be: its
    log is switched off while we capture.
(3) One `_fsdp_param_group` in place of several.
"""
