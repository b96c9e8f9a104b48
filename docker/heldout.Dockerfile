# Head and workers of the Ray cluster that studies run on. Build from the root of the repository:
#   docker build -f docker/heldout.Dockerfile -t heldout-cpu .
#   docker build -f docker/heldout.Dockerfile -t heldout-gpu --build-arg TENSORFLOW='tensorflow[and-cuda]' .
# The GPU variant differs by the CUDA libraries that TensorFlow's wheels name; the driver comes from the host.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build
ARG TENSORFLOW=tensorflow
WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY search search
COPY spaces spaces
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/heldout && /opt/heldout/bin/pip install '.[ray,service]' "${TENSORFLOW}"

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/heldout /opt/heldout
COPY docker/entrypoint.sh /opt/heldout/bin/heldout-entrypoint
# KubeRay's probes call wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/* \
    && chmod 0755 /opt/heldout/bin/heldout-entrypoint \
    && useradd --uid 10001 --create-home heldout \
    && install -d -o heldout -g heldout /workspace
ENV PATH=/opt/heldout/bin:$PATH TF_CPP_MIN_LOG_LEVEL=2 HELDOUT_WORKSPACE=/workspace
USER 10001
WORKDIR /home/heldout
ENTRYPOINT ["heldout-entrypoint"]
CMD ["worker"]
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s --retries=3 CMD ["heldout-entrypoint", "healthy"]
