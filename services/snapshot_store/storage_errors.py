"""What a person has to mend before an S3 can be used: a sentence for each way it refuses at the start."""

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
    """For an S3 that answered with this error code."""
    where = f"the S3 at {config.endpoint} (snapshot_store.endpoint)"
    if code == "NoSuchBucket":
        return UserError(
            f"{where} has no bucket {config.bucket!r} (snapshot_store.bucket): make it, or let the store make it with "
            f"--snapshot_store.create_bucket=true"
        )
    if code in _UNKNOWN_CREDENTIALS:
        return UserError(f"{where} does not accept the credentials ({code}: {message}): set {_CREDENTIALS} to its own")
    if code == "AccessDenied":
        return UserError(
            f"{where} denies what the store needs in bucket {config.bucket!r} ({message}): give the credentials' "
            f"owner the actions that docs/operations.md lists under S3, or use other credentials"
        )
    if code == "RequestTimeTooSkewed":
        return UserError(
            f"{where} refuses requests because this machine's clock and its own differ too much: set the wrong one, "
            f"for example by NTP",
            ExitCode.UNAVAILABLE,
        )
    if code in _OTHER_REGION:
        return UserError(
            f"{where} is not in region {config.region!r} (snapshot_store.region): set it to the bucket's ({message})"
        )
    return UserError(f"{where} answered {code}: {message}", ExitCode.UNAVAILABLE)


def unreachable(config: SnapshotStoreConfig, problem: str) -> UserError:
    """For an S3 that did not answer as one."""
    where = f"the S3 at {config.endpoint} (snapshot_store.endpoint)"
    if "CERTIFICATE_VERIFY_FAILED" in problem:
        return UserError(
            f"the certificate of {where} is not trusted: name the file (PEM) of the authority that signed it with "
            f"snapshot_store.ca_file ({problem})"
        )
    return UserError(f"{where} cannot be reached: start it, or correct the address ({problem})", ExitCode.UNAVAILABLE)


def without_credentials(problem: str) -> UserError:
    """For a store that was given none."""
    return UserError(
        f"no credentials for the S3 were found ({problem}): set {_CREDENTIALS}, write the usual credential file, or "
        f"run where a role gives some (docs/operations.md, S3)"
    )


def not_conditional(config: SnapshotStoreConfig) -> UserError:
    """For an S3 that lets a second writer of a name win."""
    return UserError(
        f"the S3 at {config.endpoint} (snapshot_store.endpoint) ignores If-None-Match: versions would not be safe from "
        f"being overwritten; use MinIO or another S3 with conditional writes"
    )
