"""Object storage that speaks S3: what lies under an address, and a copy of it on this machine.

Credentials, region and endpoint come from the environment and the files that every S3 tool reads (AWS_ACCESS_KEY_ID,
AWS_PROFILE, AWS_ENDPOINT_URL …); an endpoint given by the user wins.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec import Struct

from retrofill.backfill.unpack import hidden
from retrofill.errors import InputError

_GLOB = "*?["


class Object(Struct, frozen=True):
    """One stored object. etag changes with its content."""

    url: str
    key: str
    size: int
    etag: str


def listing(url: str, *, endpoint: str | None) -> list[Object]:
    """Return the objects under `s3://bucket/key`, `s3://bucket/prefix/` or a glob of keys.

    Raises InputError when the storage does not answer or refuses.
    """
    bucket, pattern = _split(url)
    at = min((pattern.index(mark) for mark in _GLOB if mark in pattern), default=-1)
    prefix = pattern if at < 0 else pattern[:at]
    found = []
    with _Asked(url):
        pages = _client(endpoint).get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            found += [
                Object(f"s3://{bucket}/{one['Key']}", one["Key"], one["Size"], one["ETag"])
                for one in page.get("Contents", [])
            ]
    if at >= 0:
        return [one for one in found if fnmatchcase(one.key, pattern)]
    folder = pattern if not pattern or pattern.endswith("/") else f"{pattern}/"
    # Some tools keep an empty object with the name of a folder, so that it is there.
    exact = [one for one in found if one.key == pattern != folder]
    inside = [one for one in found if one.key.startswith(folder)]
    return exact or [
        one for one in inside if not hidden(PurePosixPath(one.key.removeprefix(folder)))
    ]


def download(url: str, to: Path, *, endpoint: str | None) -> Path:
    """Copy one object to a file, streaming. A copy is whole or not there."""
    bucket, key = _split(url)
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f"{to.name}.part")
    with _Asked(url):
        _client(endpoint).download_file(bucket, key, str(part))
    return part.rename(to)


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def _client(endpoint: str | None) -> Any:  # boto3 makes its classes while it runs
    import boto3  # noqa: PLC0415  # a second of start for few sources

    return boto3.client("s3", endpoint_url=endpoint)


class _Asked:
    """Turns the storage's errors into ours, naming the address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        from boto3.exceptions import Boto3Error  # noqa: PLC0415  # as above
        from botocore.exceptions import (  # noqa: PLC0415  # as above
            BotoCoreError,
            ClientError,
        )

        if isinstance(error, BotoCoreError | ClientError | Boto3Error):
            raise InputError(
                f"The object storage said: {error}",
                where=self.url,
                mend="Look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the endpoint",
            ) from error
