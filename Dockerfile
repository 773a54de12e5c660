# An image that runs tinymim. Apart from the base image, everything comes from PyPI.
#   docker build -t tinymim .
#   docker run --rm --shm-size=2g -v "$PWD/runs:/data/runs" tinymim demo
FROM python:3.11-slim AS build
# PyPI's torch for Linux has CUDA. https://download.pytorch.org/whl/cpu has a smaller one for CPUs.
ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY . .
RUN python -m venv /opt/tinymim \
    && /opt/tinymim/bin/pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple \
        -c constraints.txt torch torchvision \
    && /opt/tinymim/bin/pip install -c constraints.txt . \
    && /opt/tinymim/bin/tinymim --version

FROM python:3.11-slim
COPY --from=build /opt/tinymim /opt/tinymim
ENV PATH=/opt/tinymim/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 tinymim && mkdir /data && chown tinymim /data
USER tinymim
WORKDIR /data
ENTRYPOINT ["tinymim"]
CMD ["--help"]
