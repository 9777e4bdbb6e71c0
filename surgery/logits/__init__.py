"""Logits that never stand whole: what becomes of them is written down, and computed by rows."""

from surgery.logits import layout as layout
from surgery.logits import losses as losses
from surgery.logits import reductions as reductions
from surgery.logits import written as written
