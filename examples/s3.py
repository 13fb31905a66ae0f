"""Shard a model into a bucket, check it there, and load one rank from it. No shard touches the local disk.

::

    export AWS_ENDPOINT_URL=http://localhost:9000     # for a server that is not Amazon's
    export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_DEFAULT_REGION=us-east-1
    python examples/s3.py ./llama s3://bucket/llama-tp4

The model may lie in a bucket as well. Credentials, region and endpoint are found the way boto3 finds them.
"""

from __future__ import annotations

import argparse

import shardtool


def main() -> None:
    """Save, verify and load without the file system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", help="s3://bucket/folder")
    parser.add_argument("--tp", type=int, default=4)
    args = parser.parse_args()

    done = shardtool.save(args.model, args.output, tp=args.tp, memory_limit="256MiB")
    print(f"{done.written:,} bytes written, {done.kept:,} were there already")
    print("verified" if shardtool.verify(args.output).ok else "damaged")

    tensors = shardtool.load(args.output, rank=args.tp - 1, memory_limit="256MiB")
    print(f"rank {args.tp - 1} has {len(tensors)} tensors")

    with shardtool.open_store(args.output) as store:
        for found in store.list():
            print(f"{found.size:>12,}  {found.key}")


if __name__ == "__main__":
    main()
