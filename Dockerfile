# syntax=docker/dockerfile:1
# No model inside: the base is fetched or mounted at start and kept in the volume /cache.
# For a GPU, with what Triton needs to compile its launchers where it runs:
#   docker build --target cuda -t loramux:cuda .
#   docker run --gpus all -p 127.0.0.1:50051:50051 loramux:cuda serve --insecure
# It listens on all of the container's addresses, and so wants --keys FILE, or --insecure where only
# this machine reaches the published ports.
# For a CPU, with torch's smaller build:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t loramux .

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/loramux
WORKDIR /src
COPY . .
RUN /opt/loramux/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim AS serve
LABEL org.opencontainers.image.title="loramux" \
      org.opencontainers.image.description="Many LoRA adapters over one quantized base, over gRPC" \
      org.opencontainers.image.version="0.1.0"
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home loramux \
    && install -d -o loramux -g loramux /cache /adapters
COPY --from=build /opt/loramux /opt/loramux
ENV PATH=/opt/loramux/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAMUX_CACHE=/cache \
    LORAMUX_GRPC_ADDRESS=0.0.0.0:50051 \
    LORAMUX_HTTP_ADDRESS=0.0.0.0:8080 \
    LORAMUX_ADAPTER_ROOTS=/adapters
USER 1000
WORKDIR /home/loramux
VOLUME ["/cache", "/adapters"]
EXPOSE 50051 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
ENTRYPOINT ["loramux"]
CMD ["serve"]

# The driver comes from the host. Python's headers are in the base image; compiled kernels are kept.
FROM serve AS cuda
USER root
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/cache/triton
USER 1000

FROM serve
