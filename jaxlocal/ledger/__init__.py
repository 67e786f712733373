"""What is said: the messages that papers count, the bytes that cross a mesh, and the audit that
reads from a compiled program whether they do."""

from jaxlocal.ledger.audit import Audited, audit
from jaxlocal.ledger.counts import by_kind, messages, wire

__all__ = ["Audited", "audit", "by_kind", "messages", "wire"]
