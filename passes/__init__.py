"""The passes: one method, one file, each opening with its paper and its equations."""

from passes.badam import BAdam as BAdam
from passes.chunked_loss import ChunkedLoss as ChunkedLoss
from passes.compress import Compress as Compress
from passes.flat_lora import FlatLora as FlatLora
from passes.galore import Galore as Galore
from passes.lisa import Lisa as Lisa
from passes.lisa import outlier_ratios as outlier_ratios
from passes.lozo import Lozo as Lozo
from passes.mezo import Mezo as Mezo
from passes.misa import Misa as Misa
from passes.recompute import Recompute as Recompute
from passes.rso import Rso as Rso
from passes.sherl import Sherl as Sherl
from passes.sherl import load_side_path as load_side_path
from passes.sparse_mezo import SparseMezo as SparseMezo
from passes.subzero import SubZero as SubZero
from passes.trim import Trim as Trim
from passes.velora import Velora as Velora
