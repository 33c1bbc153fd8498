"""Error texts for an S3 that the store cannot use at its start."""

from palimpsest.common.config.schema import SnapshotStoreConfig
from palimpsest.common.user_error import ExitCode, UserError

_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or MINIO_ACCESS_KEY and MINIO_SECRET_KEY"
_UNKNOWN_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidTokenId", "InvalidToken", "ExpiredToken",
}  # fmt: skip
_OTHER_REGION = {
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidLocationConstraint", "InvalidRegion",
    "PermanentRedirect", "Redirect",
}  # fmt: skip


def s3_error(config: SnapshotStoreConfig, code: str, message: str) -> UserError:
    """Return the error for an S3 that answered with this error code."""
    where = f"the S3 at {config.endpoint} (snapshot_store.endpoint)"
    if code == "NoSuchBucket":
        return UserError(
            f"{where} has no bucket {config.bucket!r} (snapshot_store.bucket): create it, or set "
            f"--snapshot_store.create_bucket=true"
        )
    if code in _UNKNOWN_CREDENTIALS:
        return UserError(f"{where} refuses the credentials ({code}: {message}): set valid {_CREDENTIALS}")
    if code == "AccessDenied":
        return UserError(
            f"{where} denies an action in bucket {config.bucket!r} ({message}): give the credentials' "
            f"owner the actions that docs/operations.md lists under S3, or use other credentials"
        )
    if code == "RequestTimeTooSkewed":
        return UserError(
            f"{where} refuses requests because its clock and this machine's clock differ too much: correct them, "
            f"for example by NTP",
            ExitCode.UNAVAILABLE,
        )
    if code in _OTHER_REGION:
        return UserError(
            f"{where} is not in region {config.region!r} (snapshot_store.region): set it to the bucket's ({message})"
        )
    return UserError(f"{where} answered {code}: {message}", ExitCode.UNAVAILABLE)


def unreachable(config: SnapshotStoreConfig, problem: str) -> UserError:
    """Return the error for an S3 that cannot be reached."""
    where = f"the S3 at {config.endpoint} (snapshot_store.endpoint)"
    if "CERTIFICATE_VERIFY_FAILED" in problem:
        return UserError(
            f"the certificate of {where} is not trusted: name the file (PEM) of the authority that signed it with "
            f"snapshot_store.ca_file ({problem})"
        )
    return UserError(f"{where} cannot be reached: start it, or correct the address ({problem})", ExitCode.UNAVAILABLE)


def without_credentials(problem: str) -> UserError:
    """Return the error for a store without credentials."""
    return UserError(
        f"no credentials for the S3 were found ({problem}): set {_CREDENTIALS}, write the usual credentials file, or "
        f"run on a machine with a role (docs/operations.md, S3)"
    )


def not_conditional(config: SnapshotStoreConfig) -> UserError:
    """Return the error for an S3 without conditional writes."""
    return UserError(
        f"the S3 at {config.endpoint} (snapshot_store.endpoint) ignores If-None-Match, so versions could be "
        f"overwritten; use MinIO or another S3 with conditional writes"
    )
