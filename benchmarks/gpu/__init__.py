"""Every pass on one GPU: `python -m benchmarks.gpu`."""
