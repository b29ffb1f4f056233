"""SwiGLU between FP8 products: what is multiplied, its gradient, and the codes of both."""

from pallas_kernels.ops.gated.api import gated_backward as gated_backward
from pallas_kernels.ops.gated.api import gated_forward as gated_forward
