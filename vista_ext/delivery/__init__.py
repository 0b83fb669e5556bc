"""From the store of the training job to every reader: queues with one user a message, and columnar snapshots."""

from vista_ext.delivery.deliver import Delivered, deliver
from vista_ext.delivery.feed import FeedConsumer, FeedProducer
from vista_ext.delivery.message import Decoded, Message, Poison, PoisonError, decode, encode, encode_erasures
from vista_ext.delivery.queue import Consumer, Producer, QueueError

__all__ = [
    "Consumer",
    "Decoded",
    "Delivered",
    "FeedConsumer",
    "FeedProducer",
    "Message",
    "Poison",
    "PoisonError",
    "Producer",
    "QueueError",
    "decode",
    "deliver",
    "encode",
    "encode_erasures",
]
