# Serve on an NVIDIA GPU:
#   docker build -t teal . && docker run --gpus all -p 8000:8000 -v teal-cache:/cache teal --checkpoint ORG/NAME --sparsity 0.5
# The container must listen on every network to be reached; give --api-key if others can reach it too.
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
