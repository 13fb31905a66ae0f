"""What Azure lists is understood, and what is no list is refused."""

from __future__ import annotations

import base64

import pytest

from shardtool.errors import FormatError
from shardtool.stores.azure.lists import Blob, blobs_of, block_list, block_name, blocks_of

MARK = "0123456789abcdef" * 2


def listing(blobs: str, after: str = "") -> bytes:
    """A page as Azure sends it, with a byte order mark."""
    return (
        '\ufeff<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="c"><Blobs>'
        f"{blobs}</Blobs><NextMarker>{after}</NextMarker></EnumerationResults>"
    ).encode()


def blob(name: str, size: object = 3, rest: str = "") -> str:
    """One blob of a page; ``name`` is the element."""
    return f"<Blob>{name}<Properties><Etag>0x8D</Etag><Content-Length>{size}</Content-Length></Properties>{rest}</Blob>"


def test_a_page_has_blobs_and_says_how_to_go_on() -> None:
    page = listing(blob("<Name>a/b &amp; c</Name>") + blob("<Name>ü</Name>", 0), "next!1")
    assert blobs_of(page, "az://c") == ([Blob("a/b & c", 3, "0x8D", {}), Blob("ü", 0, "0x8D", {})], "next!1")
    assert blobs_of(listing(""), "az://c") == ([], "")


@pytest.mark.parametrize("code", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_list_with_a_document_type_is_refused(code: str) -> None:
    """A few bytes may become many by its entities."""
    text = f'<?xml version="1.0" encoding="{code[:6]}"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">]>'
    text += "<EnumerationResults><NextMarker>&a;&a;</NextMarker></EnumerationResults>"
    with pytest.raises(FormatError, match="az://c sends a list that cannot be read"):
        blobs_of(text.encode(code), "az://c")


def test_names_that_xml_cannot_say_are_quoted() -> None:
    page = listing(blob('<Name Encoded="true">a%EF%BF%BFb%2520</Name>') + blob("<Name>a%2520</Name>"))
    assert [found.name for found in blobs_of(page, "az://c")[0]] == ["a\uffffb%20", "a%2520"]


def test_metadata_is_named_as_in_a_head() -> None:
    page = listing(blob("<Name>a</Name>", 0, "<Metadata><Hdi_IsFolder>true</Hdi_IsFolder><empty /></Metadata>"))
    assert blobs_of(page, "az://c")[0][0].about == {"x-ms-meta-hdi_isfolder": "true", "x-ms-meta-empty": ""}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>not Azure</html>",
        b"{}",
        listing("")[:-5],
        listing(blob("")),
        listing(blob("<Name />")),
        listing(blob("<Name>a</Name>", -1)),
        listing(blob("<Name>a</Name>", "1e3")),
        listing(blob("<Name>a</Name>", "9" * 30)),
        b'<!DOCTYPE a [<!ENTITY b "bbbb">]>' + listing(blob("<Name>&b;</Name>"))[3:],
    ],
)
def test_what_is_no_list_is_refused(body: bytes) -> None:
    """Above all entities, by which a small list could fill the memory."""
    with pytest.raises(FormatError, match="az://c"):
        blobs_of(body, "az://c")


def test_blocks_know_their_writer() -> None:
    names = [block_name(number, 1_700_000_000 + number, MARK) for number in (0, 49_999)]
    assert len({len(base64.b64decode(name)) for name in names}) == 1
    assert all(len(base64.b64decode(name)) <= 64 for name in names)
    listed = "".join(f"<Block><Name>{name}</Name><Size>4</Size></Block>" for name in [*names, "eHh4", "%"])
    body = f"<BlockList><CommittedBlocks /><UncommittedBlocks>{listed}</UncommittedBlocks></BlockList>".encode()
    found = blocks_of(body, "az://c/a")
    assert (found.count, found.size, found.since) == (4, 16, 1_700_049_999.0)
    assert found.writers == {MARK, ""}
    assert blocks_of(b"<BlockList><UncommittedBlocks /></BlockList>", "az://c/a").count == 0


def test_a_blob_is_made_of_blocks_in_their_order() -> None:
    assert block_list(["eA==", "eQ=="]).endswith(
        b"<BlockList><Uncommitted>eA==</Uncommitted><Uncommitted>eQ==</Uncommitted></BlockList>"
    )
