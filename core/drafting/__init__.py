"""Drafters: what proposes tokens for the target to check. One file a drafter."""

from polyspec.drafting.base import Context, Draft, Drafter, NoDraft

__all__ = ["Context", "Draft", "Drafter", "NoDraft"]
