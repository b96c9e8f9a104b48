# MLflow's server, with its password check and PostgreSQL's driver; nothing of Heldout. From the root of the repository:
#   docker build -f docker/mlflow.Dockerfile -t heldout-mlflow .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build
COPY constraints.txt /src/
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_BUILD_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/heldout && /opt/heldout/bin/pip install 'mlflow[auth]' 'psycopg[binary]'

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/heldout /opt/heldout
COPY docker/entrypoint.sh /opt/heldout/bin/heldout-entrypoint
COPY docker/mlflow-auth.ini /opt/heldout/mlflow-auth.ini
RUN chmod 0755 /opt/heldout/bin/heldout-entrypoint \
    && useradd --uid 10001 --create-home heldout \
    && install -d -o heldout -g heldout /artifacts
ENV PATH=/opt/heldout/bin:$PATH MLFLOW_AUTH_CONFIG_PATH=/opt/heldout/mlflow-auth.ini
USER 10001
WORKDIR /home/heldout
ENTRYPOINT ["heldout-entrypoint"]
CMD ["mlflow"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 CMD ["heldout-entrypoint", "healthy"]
