"""Prometheus metrics of the store."""

from prometheus_client import Counter, Gauge

from palimpsest.common.metrics import REGISTRY

VERSIONS = Gauge("palimpsest_store_versions", "Versions in the store", registry=REGISTRY)
STORED_BYTES = Gauge("palimpsest_store_bytes", "Bytes of weights in the store", registry=REGISTRY)
OLDEST_NEEDED = Gauge("palimpsest_store_oldest_needed_version", "Lowest version under a lease", registry=REGISTRY)
RECEIVED_BYTES = Counter("palimpsest_store_received_bytes", "Bytes of weights taken in", registry=REGISTRY)
SENT_BYTES = Counter("palimpsest_store_sent_bytes", "Bytes of weights given out", registry=REGISTRY)
CLAIM_BYTES = Counter("palimpsest_store_claim_bytes", "Bytes of long log records taken in", registry=REGISTRY)
REDIRECTED = Counter(
    "palimpsest_store_redirected_reads", "Reads sent to the S3 by a presigned address", registry=REGISTRY
)
STORAGE_FAILURES = Counter(
    "palimpsest_store_storage_failures", "Requests that found the storage not answering", registry=REGISTRY
)
SWEPT_CLAIMS = Counter(
    "palimpsest_store_swept_claims", "Bodies of log records removed for their age", registry=REGISTRY
)
SWEPT_VERSIONS = Counter(
    "palimpsest_store_swept_versions", "Versions removed because no lease needed them", registry=REGISTRY
)
REFUSED = Counter("palimpsest_store_refused", "Writes refused", ["reason"], registry=REGISTRY)
# reason: digest_mismatch, version_conflict, damaged_manifest, object_missing, fenced, writer_unknown,
# checkpoint_conflict
