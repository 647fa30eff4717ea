# syntax=docker/dockerfile:1
# No model inside: the base is fetched or mounted at start and kept in the volume /cache.
# For the smaller CPU build of torch:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t loramux .

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL=""
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/loramux
WORKDIR /src
COPY . .
RUN /opt/loramux/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
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
