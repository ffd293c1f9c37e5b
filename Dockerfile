# Serve on an NVIDIA GPU:
#   docker build -t teal . && docker run --init --gpus all -p 127.0.0.1:8000:8000 -v teal-cache:/cache teal --checkpoint ORG/NAME --sparsity 0.5
# The container must listen on every network to be reached. To let others reach it, publish with -p 8000:8000 and give
# -e TEAL_API_KEY=..., or --allow-host for each name it is called by. docker stop -t 40 lets answers end (--drain-seconds).
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
ENV XDG_CACHE_HOME=/cache
VOLUME /cache
EXPOSE 8000
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
