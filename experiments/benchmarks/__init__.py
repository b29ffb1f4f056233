"""Speed and error of the kernels beside every peer that is installed."""
