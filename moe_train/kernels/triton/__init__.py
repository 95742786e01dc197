"""Triton: imported only where it runs, as `choose.implementation` decides."""
