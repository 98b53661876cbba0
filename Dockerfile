# syntax=docker/dockerfile:1
# Targets: cpu (the default), gpu, train, load.  docker build --target gpu -t faster-rcnn-service:gpu .
#
# cpu and gpu hold the service alone: no torch, no pip, no compiler, no shell script. They run as user 10001 on a read-only root.
# A mirror of the package registry: docker build --secret id=pip,src=pip.conf .

# The version that the tests run on. Debian's slim image: wheels of onnxruntime and CUDA need glibc.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS python
# ONNX Runtime's wheels send usage events to their makers unless told not to.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin detector

# One pip for all environments; none of them keeps it.
FROM python AS pip
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_REQUIRE_HASHES=1 PIP_ONLY_BINARY=:all:
RUN python -m venv /opt/pip && python -m venv --without-pip /opt/venv
COPY requirements/ /requirements/

FROM pip AS packages-cpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --requirement /requirements/cpu.txt

FROM pip AS packages-gpu
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --requirement /requirements/gpu.txt

FROM pip AS packages-train
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --requirement /requirements/train.txt

FROM pip AS packages-load
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --requirement /requirements/load.txt

# CycloneDX bills of the Python packages; Debian's are in the image's own dpkg database, where scanners look for them.
# The environments are mounted, not copied: those with CUDA are gigabytes.
FROM pip AS bills
RUN --mount=type=secret,id=pip,target=/etc/pip.conf /opt/pip/bin/pip install --requirement /requirements/sbom.txt
FROM bills AS bill-cpu
RUN --mount=type=bind,from=packages-cpu,source=/opt/venv,target=/opt/venv \
    /opt/pip/bin/cyclonedx-py environment /opt/venv/bin/python --output-reproducible --output-file /python.cdx.json
FROM bills AS bill-gpu
RUN --mount=type=bind,from=packages-gpu,source=/opt/venv,target=/opt/venv \
    /opt/pip/bin/cyclonedx-py environment /opt/venv/bin/python --output-reproducible --output-file /python.cdx.json
FROM bills AS bill-train
RUN --mount=type=bind,from=packages-train,source=/opt/venv,target=/opt/venv \
    /opt/pip/bin/cyclonedx-py environment /opt/venv/bin/python --output-reproducible --output-file /python.cdx.json
FROM bills AS bill-load
RUN --mount=type=bind,from=packages-load,source=/opt/venv,target=/opt/venv \
    /opt/pip/bin/cyclonedx-py environment /opt/venv/bin/python --output-reproducible --output-file /python.cdx.json

# Compiled here, because a read-only root cannot keep what the first start compiles. Hashes, not times: layers lose times.
FROM python AS code
WORKDIR /app
COPY deploy/healthcheck.py ./
COPY service/ service/
RUN python -m compileall -q --invalidation-mode unchecked-hash service healthcheck.py

FROM python AS train
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="faster-rcnn-service train" \
      org.opencontainers.image.description="Trains a Faster R-CNN and exports it to one verified ONNX file" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/venv/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility HOME=/tmp
WORKDIR /app
COPY --from=packages-train /opt/venv /opt/venv
COPY --from=bill-train /python.cdx.json /usr/share/sbom/python.cdx.json
COPY service/ service/
COPY model/ model/
COPY export/ export/
# A checkpoint and a model card name the commit that they came from; an image holds no checkout to ask.
ENV SOURCE_REVISION=${REVISION}
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["model.train", "--help"]

# The load generator of the compose profile `load`.
FROM python AS load
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="faster-rcnn-service load" \
      org.opencontainers.image.description="Asks a detection service at a rate and measures how it answers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/venv/bin:$PATH MPLCONFIGDIR=/tmp
WORKDIR /app
COPY --from=packages-load /opt/venv /opt/venv
COPY --from=bill-load /python.cdx.json /usr/share/sbom/python.cdx.json
COPY benchmarks/ benchmarks/
USER 10001:10001
ENTRYPOINT ["python", "-m", "benchmarks.load"]
CMD ["--help"]

FROM python AS serve
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH DETECTOR_MODEL_REPOSITORY=/models
COPY --from=code /app /app
COPY model_repository/ /models/
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "healthcheck.py"]
ENTRYPOINT ["python", "-m", "service"]

FROM serve AS gpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="faster-rcnn-service gpu" \
      org.opencontainers.image.description="Serves Faster R-CNN over HTTP on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A GPU image without a GPU is a mistake to hear of at start, not a slow service.
ENV DETECTOR_PROVIDER=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=bill-gpu /python.cdx.json /usr/share/sbom/python.cdx.json

FROM serve AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="faster-rcnn-service cpu" \
      org.opencontainers.image.description="Serves Faster R-CNN over HTTP on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV DETECTOR_PROVIDER=cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=bill-cpu /python.cdx.json /usr/share/sbom/python.cdx.json
