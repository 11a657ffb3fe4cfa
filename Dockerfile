# The server's images, for x86-64. deploy/image/build.sh builds the first one without a daemon; with docker:
#   docker build -t steering-operators --build-arg PIP_EXTRA_INDEX_URL=... .     the engine hf, on CPU
#   docker build -t steering-operators-gpu --target gpu .                        the engine vllm, on CUDA
# The index is one that holds torch's CPU build, the only build of torch that server.lock lets in.
#   docker run -p 127.0.0.1:50051:50051 -v steer:/var/lib/steer -e STEER_INSECURE=true steering-operators
# So for this machine alone. For others without STEER_INSECURE, and with TLS and tokens.
ARG BASE=python:3.11-slim-bookworm

# Nothing of this stage reaches an image but the empty environment.
FROM ${BASE} AS tools
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
# Of the wheel that is made here.
ARG SOURCE_DATE_EPOCH=315532800
# pip reads them from here; an empty one is none. Not every builder hands an ARG to the stages that are made from its own.
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} \
    PIP_FIND_LINKS=${PIP_FIND_LINKS} \
    PIP_NO_INDEX=${PIP_NO_INDEX} \
    SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONHASHSEED=0
RUN python3 -m venv /opt/tools \
    && python3 -m venv --without-pip /opt/steer
WORKDIR /src

# What the CPU image holds of others: a layer that changes only with the lock. Tests, headers and programs that only
# a compiler of torch would use are left out. Bytecode is made here, because the root may be read-only, and believed
# whatever the time of its source: a builder may set that. -S keeps what is compiled from being loaded, which would change
# a few bits of it.
FROM tools AS dependencies
COPY deploy/image/server.lock ./
RUN /opt/tools/bin/pip --python /opt/steer/bin/python install --no-compile --require-hashes -r server.lock \
    && cd /opt/steer/lib/python3.11/site-packages \
    && rm -r torch/test torch/include \
    && find torch/bin -mindepth 1 -maxdepth 1 -not -name torch_shm_manager -exec rm -r {} + \
    && find . -type d -name tests -prune -exec rm -r {} + \
    && /opt/steer/bin/python -S -m compileall -q --invalidation-mode unchecked-hash -x /py312_ /opt/steer/lib

FROM tools AS gpu-dependencies
COPY deploy/image/gpu.lock ./
RUN /opt/tools/bin/pip --python /opt/steer/bin/python install --no-compile --require-hashes -r gpu.lock \
    && /opt/steer/bin/python -S -m compileall -q --invalidation-mode unchecked-hash -x /py312_ /opt/steer/lib

# The project's own files, under /staged.
FROM tools AS project
COPY deploy/image/build.lock ./
RUN /opt/tools/bin/pip install --require-hashes -r build.lock
COPY pyproject.toml README.md LICENSE ./
COPY operators operators
COPY steer_server steer_server
COPY clients clients
COPY protos protos
RUN /opt/tools/bin/pip wheel --no-build-isolation --no-deps --wheel-dir /wheel . \
    && /opt/tools/bin/pip --python /opt/steer/bin/python install --no-compile --no-deps --no-warn-script-location \
        --root /staged /wheel/*.whl \
    && /opt/steer/bin/python -S -m compileall -q --invalidation-mode unchecked-hash -s /staged -p / /staged

# What both images are, but for /opt/steer.
FROM ${BASE} AS base
ARG SOURCE_DATE_EPOCH=315532800
# A fixed uid, so that the owner of a mounted volume can be set from outside.
RUN groupadd --gid 10001 steer \
    && useradd --uid 10001 --gid steer --no-log-init --home-dir /var/lib/steer --shell /usr/sbin/nologin steer \
    && rm -f /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow- \
    && install -d -o steer -g steer /var/lib/steer /var/lib/steer/data /var/lib/steer/cache
# Of Python's own library, which the base may have without bytecode.
RUN PYTHONHASHSEED=0 python3 -S -m compileall -qf --invalidation-mode unchecked-hash -x '/(.*-packages|ensurepip|test)/' \
        "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# XDG_DATA_HOME holds the operator store; it is what to back up.
# XDG_CACHE_HOME holds downloaded models; it can be dropped and is filled again.
# The server listens to the whole container, and the container's ports say who reaches that.
ENV PATH=/opt/steer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/steer \
    XDG_DATA_HOME=/var/lib/steer/data \
    XDG_CACHE_HOME=/var/lib/steer/cache \
    STEER_LISTEN=0.0.0.0:50051 \
    STEER_METRICS_HOST=0.0.0.0 \
    STEER_METRICS_PORT=9464
USER 10001:10001
WORKDIR /var/lib/steer
# All that is written at run time is written here: the root may be read-only.
VOLUME /var/lib/steer
# gRPC, then Prometheus metrics.
EXPOSE 50051 9464
# The server drains its requests on SIGTERM; give it time (docker stop --time).
STOPSIGNAL SIGTERM
# The standard gRPC health service; the start period is the model's loading time.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD ["steer", "health"]
ENTRYPOINT ["steer-server"]

# Not built so far: docs/IMAGE.md says which lines were run. docs/LARGE.md says how to run it.
# CUDA's libraries come with the wheels of torch and vLLM; the driver comes from the host, by NVIDIA's
# container runtime.
FROM base AS gpu
USER root
# Triton compiles its launchers when a kernel is first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=gpu-dependencies /opt/steer /opt/steer
COPY --from=project /staged/opt/steer /opt/steer
# FlashInfer would compile its sampler at run time, with an nvcc that is not on this image's path; vLLM has another one.
ENV STEER_ENGINE=vllm \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/lib/steer/cache/triton \
    VLLM_USE_FLASHINFER_SAMPLER=0
# vLLM loads, compiles, and tests its steering before the port opens.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 CMD ["steer", "health"]

# Last: what is built where no target is named.
FROM base AS runtime
COPY --from=dependencies /opt/steer /opt/steer
COPY --from=project /staged/opt/steer /opt/steer
