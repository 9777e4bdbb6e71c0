"""The passes: one method, one file, each opening with its paper and its equations."""

from passes.badam import BAdam as BAdam
from passes.chunked_loss import ChunkedLoss as ChunkedLoss
from passes.compress import Compress as Compress
from passes.lisa import Lisa as Lisa
from passes.misa import Misa as Misa
from passes.recompute import Recompute as Recompute
from passes.rso import Rso as Rso
from passes.velora import Velora as Velora
