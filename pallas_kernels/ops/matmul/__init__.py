"""Matrix products of quantised arrays."""

from pallas_kernels.ops.matmul.api import explain as explain
from pallas_kernels.ops.matmul.api import matmul as matmul
from pallas_kernels.ops.matmul.api import scaled_matmul as scaled_matmul
