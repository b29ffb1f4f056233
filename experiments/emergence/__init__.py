"""The emergence of sparse attention: theory, tasks, sweeps and figures (see README.md)."""
