"""The log on Apache Kafka, by kafka-python. Nothing outside this folder imports it."""

from palimpsest.common.bus.kafka.bus import KafkaBus
from palimpsest.common.bus.kafka.connection import Connection, connection
from palimpsest.common.bus.kafka.topics import Settings, WrongTopic

__all__ = ["Connection", "KafkaBus", "Settings", "WrongTopic", "connection"]
