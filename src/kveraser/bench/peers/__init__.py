"""What is run today instead of an erase: other engines on the same backbone, timed between our own methods."""

from __future__ import annotations

from kveraser.bench.peers.base import Peer, PeerRow, PeerTask, medians
from kveraser.bench.peers.llama_cpp import LlamaCpp
from kveraser.bench.peers.vllm import Vllm

PEERS: dict[str, type[Peer]] = {kind.name: kind for kind in (LlamaCpp, Vllm)}
"""Every peer by name, installed or not."""

__all__ = ["PEERS", "LlamaCpp", "Peer", "PeerRow", "PeerTask", "Vllm", "medians"]
