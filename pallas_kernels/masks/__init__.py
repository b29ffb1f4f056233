"""Which key each query may see: token rules (`Mask`) and tile lists (`BlockMask`)."""

from pallas_kernels.masks.block_mask import BlockMask as BlockMask
from pallas_kernels.masks.mask import EMPTY as EMPTY
from pallas_kernels.masks.mask import FULL as FULL
from pallas_kernels.masks.mask import PARTIAL as PARTIAL
from pallas_kernels.masks.mask import Mask as Mask
