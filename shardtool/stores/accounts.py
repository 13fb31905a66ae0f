"""What the environment says about accounts, where the official library does not read it itself.

The only module of the stores that reads variables; ``docs/stores.md`` lists them. An empty variable counts as one that
is not set. boto3, google-auth, azure-identity and huggingface_hub read their own variables and files; these are not
repeated here. Nothing that is read here may get into an error, a log or a manifest.

::

    store       variables
    pvc://      SHARDTOOL_PVC_ROOT                where a cluster's volume is mounted, {claim} in it stands for its name
    TLS         SSL_CERT_FILE                     certificates to trust; but for redis, in place of the system's
    az://       AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_ACCOUNT (or .._ACCOUNT_NAME), AZURE_STORAGE_KEY (or
                .._ACCOUNT_KEY), AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_ENDPOINT (or .._SERVICE_ENDPOINT),
                AZURE_SKIP_SIGNATURE
    s3://       AWS_SKIP_SIGNATURE, AWS_NO_SIGN_REQUEST   whether to ask as nobody
    gs://       STORAGE_EMULATOR_HOST
    redis://    REDIS_USERNAME, REDIS_PASSWORD    where the address has none
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

PVC_ROOT = "/model-cache"
"""Where llm-d mounts the one volume of a pod."""


def said(*names: str) -> str | None:
    """The value of the first of these variables that is set and not empty."""
    for name in names:
        if text := os.environ.get(name, "").strip():
            return text
    return None


def pvc_root() -> str:
    """Where a cluster's volume is mounted; ``{claim}`` in it stands for the claim's name."""
    return said("SHARDTOOL_PVC_ROOT") or PVC_ROOT


def ca_file() -> str | None:
    """A file of certificates that servers may be trusted by."""
    return said("SSL_CERT_FILE")


@dataclass(frozen=True, slots=True)
class AzureAccount:
    """What is known of an account of Azure; all of it may be missing. ``anonymous``: ask as nobody."""

    name: str | None = None
    connection_string: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)
    sas: str | None = field(default=None, repr=False)
    endpoint: str | None = None
    anonymous: bool = False


def azure() -> AzureAccount:
    """The account of Azure's own command line variables."""
    return AzureAccount(
        name=said("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"),
        connection_string=said("AZURE_STORAGE_CONNECTION_STRING"),
        key=said("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY"),
        sas=said("AZURE_STORAGE_SAS_TOKEN"),
        endpoint=said("AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_SERVICE_ENDPOINT"),
        anonymous=(said("AZURE_SKIP_SIGNATURE") or "").lower() in ("1", "true", "yes"),
    )


def s3_unsigned() -> bool:
    """Whether S3 servers are asked as nobody, as object_store and GDAL have it; boto3 has no variable for it."""
    return (said("AWS_SKIP_SIGNATURE", "AWS_NO_SIGN_REQUEST") or "").lower() in ("1", "true", "yes")


def gcs_emulator() -> str | None:
    """The address of a server that stands in for Google's, as Google's own libraries read it."""
    return said("STORAGE_EMULATOR_HOST")


@dataclass(frozen=True, slots=True)
class RedisAccount:
    """Who we are to a Redis server."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)


def redis() -> RedisAccount:
    """The user and the password of addresses that have none."""
    return RedisAccount(said("REDIS_USERNAME"), said("REDIS_PASSWORD"))
