# Two images from one file:
#
#   docker build --target coordinator --tag hlora-coordinator .
#   docker build --target agent --tag hlora-agent .
#
# An image for machines without an accelerator is a fifth of the size: name PyTorch's index of CPU builds and its version,
#   --build-arg PIP_EXTRA_INDEX_URL=… --build-arg TORCH=torch==2.13.0+cpu

FROM python:3.11-slim AS common
ARG PIP_EXTRA_INDEX_URL
ARG TORCH=torch==2.13.0
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --create-home --uid 10001 hlora && install --directory --owner hlora /var/lib/hlora
WORKDIR /src
COPY constraints.txt ./
# First and alone: it is large and changes seldom.
RUN pip install --constraint constraints.txt "$TORCH"

FROM common AS source
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY coordinator coordinator
COPY agent agent
COPY admin admin
COPY modelling modelling
COPY simulation simulation
COPY migrations migrations
COPY demo demo
COPY benchmarks benchmarks
COPY experiments experiments

FROM source AS coordinator
RUN pip install --constraint constraints.txt '.[coordinator]'
WORKDIR /var/lib/hlora
USER hlora
ENV HLORA_COORDINATOR_DATA=/var/lib/hlora HLORA_COORDINATOR_HOST=0.0.0.0 HLORA_COORDINATOR_LOG_JSON=true
VOLUME /var/lib/hlora
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "coordinator"]
CMD ["serve"]

FROM source AS agent
RUN pip install --constraint constraints.txt '.[agent,parquet,admin]'
WORKDIR /var/lib/hlora
USER hlora
ENV HLORA_AGENT_HOME=/var/lib/hlora HF_HOME=/var/lib/hlora/models HLORA_AGENT_LOG=json
VOLUME /var/lib/hlora
# An agent listens to nobody; it is well while its process runs and holds an identity.
HEALTHCHECK --interval=30s --timeout=5s CMD ["test", "-f", "/var/lib/hlora/credential.json"]
ENTRYPOINT ["python", "-m", "agent"]
CMD ["run"]
