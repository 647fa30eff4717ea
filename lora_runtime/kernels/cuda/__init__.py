"""The 4-bit product of bfloat16 in CUDA C++, compiled by NVRTC when it is first used."""
