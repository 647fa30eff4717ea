# syntax=docker/dockerfile:1
# No model inside: the base is fetched or mounted at start and kept in the volume /cache.
# Two images; a change of our sources rebuilds the last small layer of each, and none below it:
#   docker build -t loramux .                        for a CPU, with torch's smaller build
#   docker build --target cuda -t loramux:cuda .     for a GPU, with what Triton needs to compile
# The server listens on all addresses of its container, so it wants a file of keys
# (-v …/keys.yaml:/keys.yaml -e LORAMUX_KEYS=/keys.yaml), or -e LORAMUX_INSECURE=true.

FROM python:3.11-slim AS tools
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/loramux
ENV PATH=/opt/loramux/bin:$PATH

# What pyproject.toml asks for, without our sources: these layers change with it alone.
FROM tools AS needs
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python <<'PYTHON'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for name, wanted in (("cpu", ("cloud", "tracing")), ("cuda", ("cloud", "tracing", "gpu"))):
    needs = [*project["dependencies"], *(need for extra in wanted for need in extras[extra])]
    open(f"needs-{name}.txt", "w").write("\n".join(needs))
PYTHON

FROM needs AS needs-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt -r needs-cpu.txt

FROM needs AS needs-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt -r needs-cuda.txt

FROM tools AS wheel
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps -w /wheel .

FROM python:3.11-slim AS runtime
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="loramux" \
      org.opencontainers.image.description="Many LoRA adapters over one quantized base, over gRPC and HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home loramux \
    && install -d -o loramux -g loramux /cache /adapters
ENV PATH=/opt/loramux/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    LORAMUX_CACHE=/cache \
    LORAMUX_GRPC_ADDRESS=0.0.0.0:50051 \
    LORAMUX_HTTP_ADDRESS=0.0.0.0:8080 \
    LORAMUX_ADAPTER_ROOTS=/adapters
WORKDIR /home/loramux
VOLUME ["/cache", "/adapters"]
EXPOSE 50051 8080
STOPSIGNAL SIGTERM
# The certificate is for others' names for this server, and nobody stands between it and itself.
HEALTHCHECK --interval=10s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import os, ssl, urllib.request as r; tls = 'LORAMUX_TLS_CERT' in os.environ; r.urlopen(f'http{\"s\" * tls}://127.0.0.1:8080/healthz', timeout=2, context=ssl._create_unverified_context() if tls else None)"]
ENTRYPOINT ["loramux"]
CMD ["serve"]

# The driver comes from the host. Python's headers are in the base image; compiled kernels are kept.
FROM runtime AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/cache/triton
COPY --from=needs-cuda /opt/loramux /opt/loramux
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps /wheel/*.whl
USER 1000

FROM runtime AS cpu
COPY --from=needs-cpu /opt/loramux /opt/loramux
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --no-deps /wheel/*.whl
USER 1000
