"""The log on Apache Kafka, with kafka-python. Only this folder imports kafka-python."""

from palimpsest.common.bus.kafka.bus import KafkaBus
from palimpsest.common.bus.kafka.connection import Connection, connection
from palimpsest.common.bus.kafka.topics import Settings, WrongTopic

__all__ = ["Connection", "KafkaBus", "Settings", "WrongTopic", "connection"]
