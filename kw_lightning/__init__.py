"""KernelWarehouse (ICML 2024) for PyTorch Lightning."""
