# The server's images.
#   docker build -t steering-operators .                        the engine hf
#   docker build -t steering-operators-gpu --target gpu .       the engine vllm, on CUDA
#   docker run -p 127.0.0.1:50051:50051 -v steer:/var/lib/steer -e STEER_INSECURE=true steering-operators
# So for this machine alone. For others without STEER_INSECURE, and with TLS and tokens: SECURITY.md.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS source
# torch goes first and by exact version (the one in constraints.txt). To choose its build, name
# a local version, such as torch==2.13.0+cpu, and the index that holds it, which pip reads here:
#   docker build --build-arg TORCH=torch==2.13.0+cpu --build-arg PIP_EXTRA_INDEX_URL=...
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/steer
WORKDIR /src
# A layer of its own: it changes only with the pinned versions.
COPY constraints.txt ./
RUN /opt/steer/bin/pip install "${TORCH}" -c constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY operators operators
COPY steer_server steer_server
COPY clients clients
COPY protos protos

FROM source AS builder
RUN /opt/steer/bin/pip install '.[server]' -c constraints.txt

FROM source AS gpu-builder
COPY constraints-vllm.txt ./
# The one pin of the CPU build that the CUDA build contradicts is left out.
RUN grep -v '^apache-tvm-ffi==' constraints-vllm.txt > /tmp/constraints.txt \
    && /opt/steer/bin/pip install '.[vllm]' -c /tmp/constraints.txt

# What both images are, but for /opt/steer.
FROM python:${PYTHON}-slim AS base
# A fixed uid, so that the owner of a mounted volume can be set from outside.
RUN groupadd --gid 10001 steer \
    && useradd --uid 10001 --gid steer --home-dir /var/lib/steer --shell /usr/sbin/nologin steer \
    && install -d -o steer -g steer /var/lib/steer /var/lib/steer/data /var/lib/steer/cache
# XDG_DATA_HOME holds the operator store; it is what to back up.
# XDG_CACHE_HOME holds downloaded models; it can be dropped and is filled again.
ENV PATH=/opt/steer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_DATA_HOME=/var/lib/steer/data \
    XDG_CACHE_HOME=/var/lib/steer/cache \
    STEER_LISTEN=0.0.0.0:50051 \
    STEER_METRICS_HOST=0.0.0.0 \
    STEER_METRICS_PORT=9464
USER 10001:10001
WORKDIR /var/lib/steer
VOLUME /var/lib/steer
# gRPC, then Prometheus metrics.
EXPOSE 50051 9464
# The server drains its requests on SIGTERM; give it time (docker stop --time).
STOPSIGNAL SIGTERM
# The standard gRPC health service; the start period is the model's loading time.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD ["steer", "health"]
ENTRYPOINT ["steer-server"]

# Not built so far, for want of a container engine. docs/LARGE.md says how to run it.
# CUDA's libraries come with the wheels of torch and vLLM; the driver comes from the host, by NVIDIA's
# container runtime. TORCH stays as it is: vLLM 0.32 wants this version, in its CUDA build.
FROM base AS gpu
USER root
# Triton compiles its launchers when a kernel is first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=gpu-builder /opt/steer /opt/steer
# FlashInfer would compile its sampler at run time, with an nvcc that is not on this image's path; vLLM has another one.
ENV STEER_ENGINE=vllm \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/lib/steer/cache/triton \
    VLLM_USE_FLASHINFER_SAMPLER=0
# vLLM loads, compiles, and tests its steering before the port opens.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 CMD ["steer", "health"]

# Last: what is built where no target is named.
FROM base AS runtime
COPY --from=builder /opt/steer /opt/steer
