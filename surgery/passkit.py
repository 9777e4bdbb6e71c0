"""All that a pass may import: stable, for passes of this package and of others.

    from surgery.passkit import Method, Rounds, check_types, register, whole_blocks

Nothing else of `surgery` is promised. docs/write_a_pass.md walks through three passes; what their
authors test with is `surgery.testing`.
"""

from surgery import noise as noise
from surgery.activations.fusing import fuse as fuse
from surgery.activations.logits import chunk_head as chunk_head
from surgery.activations.logits import find_head as find_head
from surgery.activations.packed import Packer as Packer
from surgery.activations.regions import Finder as Finder
from surgery.activations.regions import cut_out as cut_out
from surgery.activations.wrap import Wrapper as Wrapper
from surgery.contract.method import EVERY as EVERY
from surgery.contract.method import Method as Method
from surgery.contract.method import Run as Run
from surgery.contract.options import check_types as check_types
from surgery.contract.options import demand as demand
from surgery.contract.registry import register as register
from surgery.errors import CaptureError as CaptureError
from surgery.errors import ConflictError as ConflictError
from surgery.errors import ModelError as ModelError
from surgery.errors import OptimizerError as OptimizerError
from surgery.errors import OptionError as OptionError
from surgery.errors import SurgeryError as SurgeryError
from surgery.errors import TargetError as TargetError
from surgery.errors import listed as listed
from surgery.graph.calls import insert as insert
from surgery.graph.calls import is_cheap as is_cheap
from surgery.graph.calls import node as node
from surgery.graph.nodes import is_by_identity as is_by_identity
from surgery.graph.reading import SIMPLE as SIMPLE
from surgery.graph.reading import all_graphs as all_graphs
from surgery.graph.reading import bodies as bodies
from surgery.graph.reading import is_linear as is_linear
from surgery.graph.reading import is_random as is_random
from surgery.graph.reading import module_of as module_of
from surgery.graph.reading import name_of as name_of
from surgery.graph.reading import operands as operands
from surgery.graph.reading import value_of as value_of
from surgery.graph.reading import writes as writes
from surgery.graph.saved import Saved as Saved
from surgery.graph.simplify import copied as copied
from surgery.kernels import directions as directions
from surgery.ranks import add_up as add_up
from surgery.ranks import rank_of_world as rank_of_world
from surgery.sampling.budget import BudgetSampler as BudgetSampler
from surgery.sampling.rounds import Ending as Ending
from surgery.sampling.rounds import Rounds as Rounds
from surgery.sampling.rounds import Scores as Scores
from surgery.sampling.rounds import weight_norms as weight_norms
from surgery.sampling.rounds import whole_blocks as whole_blocks
from surgery.subspace.method import Projecting as Projecting
from surgery.subspace.method import choose as choose
from surgery.subspace.method import densely as densely
from surgery.subspace.method import mapped as mapped
from surgery.subspace.nodes import Projection as Projection
from surgery.weights.coordinate import Coordinate as Coordinate
from surgery.weights.coordinate import Precision as Precision
from surgery.weights.coordinate import Whole as Whole
from surgery.weights.coordinate import coordinate_of as coordinate_of
from surgery.weights.linears import inputs_of as inputs_of
from surgery.weights.linears import linears as linears
from surgery.weights.matrices import matrix_of as matrix_of
from surgery.weights.matrices import matrix_shape as matrix_shape
from surgery.weights.matrices import wide as wide
from surgery.weights.modules import is_matrix as is_matrix
from surgery.weights.modules import is_transposed as is_transposed
from surgery.weights.parts import split as split
from surgery.weights.shards import local_state as local_state
from surgery.weights.shards import rows_of as rows_of
from surgery.weights.targets import Targets as Targets
from surgery.weights.targets import blocks as blocks
from surgery.weights.targets import matched as matched
from surgery.weights.targets import select as select
from surgery.zeroth_order.direction import Perturbation as Perturbation
from surgery.zeroth_order.direction import number as number
from surgery.zeroth_order.method import TwoPoint as TwoPoint
from surgery.zeroth_order.options import Decaying as Decaying
from surgery.zeroth_order.options import ZerothOrder as ZerothOrder
from surgery.zeroth_order.thin import LowRank as LowRank
from surgery.zeroth_order.thin import spread as spread
