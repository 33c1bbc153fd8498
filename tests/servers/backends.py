"""Clients of the servers of tools/backends."""

from typing import Any

import urllib3
from minio import Minio as Client

from tools.backends.kafka import PROTOCOLS, Kafka
from tools.backends.minio import Minio


def kafka_client(kafka: Kafka, mechanism: str = "SCRAM-SHA-512") -> dict[str, Any]:
    """Settings with which any kafka-python client can connect to this server."""
    settings: dict[str, Any] = {
        "bootstrap_servers": kafka.servers,
        "security_protocol": PROTOCOLS[kafka.security],
    }
    if "tls" in kafka.security:
        settings |= {"ssl_cafile": str(kafka.ca_file)}
    if kafka.require_certificate:
        settings |= {"ssl_certfile": str(kafka.certificate_file), "ssl_keyfile": str(kafka.key_file)}
    if "sasl" in kafka.security:
        settings |= {
            "sasl_mechanism": mechanism,
            "sasl_plain_username": kafka.username,
            "sasl_plain_password": kafka.password,
        }
    return settings


def s3_client(minio: Minio) -> Client:
    """S3 client with this server's credentials."""
    http = urllib3.PoolManager(ca_certs=str(minio.ca_file)) if minio.tls else None
    return Client(
        f"127.0.0.1:{minio.port}",
        access_key=minio.access_key,
        secret_key=minio.secret_key,
        secure=minio.tls,
        http_client=http,
    )
