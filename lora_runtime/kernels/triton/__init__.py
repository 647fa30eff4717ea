"""The ops for CUDA tensors in Triton. `lora_runtime.kernels.gpu` imports a module at its first use.

`*_kernels.py` hold the kernels' bodies; the module without that ending says what they are for,
chooses tiles and launches them.
"""
