"""Prometheus metrics of the store."""

from prometheus_client import Counter, Gauge

from palimpsest.common.metrics import REGISTRY

VERSIONS = Gauge("palimpsest_store_versions", "Versions in the store", registry=REGISTRY)
STORED_BYTES = Gauge("palimpsest_store_bytes", "Bytes of weights in the store", registry=REGISTRY)
USED_BYTES = Gauge(
    "palimpsest_store_used_bytes",
    "Bytes of weights that count against the limit, with uploads on their way",
    registry=REGISTRY,
)
REBASED = Counter(
    "palimpsest_store_rebased_versions", "Versions stored in full to free the chain before them", registry=REGISTRY
)
QUOTA_BYTES = Gauge(
    "palimpsest_store_quota_bytes", "Limit on the bytes of weights in the store, 0 without one", registry=REGISTRY
)
OLDEST_NEEDED = Gauge("palimpsest_store_oldest_needed_version", "Lowest version under a lease", registry=REGISTRY)
RECEIVED_BYTES = Counter("palimpsest_store_received_bytes", "Bytes of weights received", registry=REGISTRY)
SENT_BYTES = Counter("palimpsest_store_sent_bytes", "Bytes of weights sent", registry=REGISTRY)
CLAIM_BYTES = Counter("palimpsest_store_claim_bytes", "Bytes of long log records received", registry=REGISTRY)
REDIRECTED = Counter("palimpsest_store_redirected_reads", "Reads redirected to a presigned S3 URL", registry=REGISTRY)
STORAGE_FAILURES = Counter(
    "palimpsest_store_storage_failures", "Requests that failed because the storage did not answer", registry=REGISTRY
)
SWEPT_CLAIMS = Counter(
    "palimpsest_store_swept_claims", "Bodies of log records removed because of their age", registry=REGISTRY
)
SWEPT_VERSIONS = Counter(
    "palimpsest_store_swept_versions", "Versions removed because no lease needed them", registry=REGISTRY
)
REFUSED = Counter("palimpsest_store_refused", "Writes refused, by reason", ["reason"], registry=REGISTRY)
# reason: digest_mismatch, version_conflict, damaged_manifest, object_missing, parent_missing, fenced, writer_unknown,
# checkpoint_conflict, quota_reached
