"""What a picture says of itself in XMP (ISO 16684-1), which picture archives, editors and viewers show."""

import re
from typing import NamedTuple
from xml.sax.saxutils import escape

from ..consislora_core import __version__
from ..consislora_core.files import escape_text

# https://iptc.org/std/photometadata/specification: the property, and the word for pictures that a trained model made.
TRAINED_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
DESCRIPTION = "Made by a trained model, with ComfyUI-ConsisLoRA."
LONGEST = 2000  # characters of a text, as IPTC allows
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:consislora="urn:consislora:xmp:1.0:">
{properties}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


class Credits(NamedTuple):
    """What people want to know of a picture. creator: several with ; between. record: how it was made, as JSON."""

    title: str = ""
    creator: str = ""
    rights: str = ""
    record: str = ""


def xmp_packet(credits: Credits) -> bytes:
    """XMP with the credits, those that are empty excepted, and with the fact that a trained model made the picture."""
    creators = [name.strip() for name in credits.creator.split(";")]
    properties = [
        _texts("dc:title", "Alt", [credits.title]),
        _texts("dc:creator", "Seq", creators),
        _texts("dc:rights", "Alt", [credits.rights]),
        _texts("dc:description", "Alt", [DESCRIPTION]),
        f"   <Iptc4xmpExt:DigitalSourceType>{TRAINED_MODEL}</Iptc4xmpExt:DigitalSourceType>",
        f"   <xmp:CreatorTool>ComfyUI-ConsisLoRA {__version__}</xmp:CreatorTool>",
        f"   <consislora:record>{_in_xml(credits.record)}</consislora:record>" if credits.record else "",
    ]
    return PACKET.format(properties="\n".join(filter(None, properties))).encode()


def _texts(name: str, kind: str, texts: list[str]) -> str:
    """A property that holds an array of texts: Seq of several, or Alt of one in several languages."""
    language = ' xml:lang="x-default"' * (kind == "Alt")
    items = "".join(f"<rdf:li{language}>{_in_xml(text[:LONGEST])}</rdf:li>" for text in texts if text)
    return f"   <{name}><rdf:{kind}>{items}</rdf:{kind}></{name}>" if items else ""


def _in_xml(text: str) -> str:
    """The text without what XML cannot hold: control characters."""
    return escape(NO_XML.sub("", escape_text(text)))
