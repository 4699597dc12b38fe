"""What is run today instead of an erase: other engines on the same backbone, timed between our own methods."""

from __future__ import annotations

from evaluation.peers.llama_cpp import LlamaCpp
from evaluation.peers.vllm import Vllm
from kveraser.measure.peer import Peer, PeerRow, PeerTask, medians

PEERS: dict[str, type[Peer]] = {kind.name: kind for kind in (LlamaCpp, Vllm)}
"""Every peer by name, installed or not."""

__all__ = ["PEERS", "LlamaCpp", "Peer", "PeerRow", "PeerTask", "Vllm", "medians"]
