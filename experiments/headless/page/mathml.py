r"""TeX to MathML, which browsers show without a script or a font from the network."""

from __future__ import annotations

import html
import logging
import re
import xml.etree.ElementTree as ElementTree

from latex2mathml.converter import convert as latex_to_mathml

_log = logging.getLogger(__name__)


def tex_to_mathml(tex: str, display: str) -> str:
    r"""One formula as MathML; display is "inline" or "block". TeX that cannot be converted is shown as it stands."""
    source = re.sub(r"\\(begin|end)\{(?:aligned|split)\}", r"\\\1{align*}", tex.strip())
    source = re.sub(r"\\(?:begin|end)\{equation\*?\}", "", source.replace(r"\operatorname*", r"\operatorname"))
    source = re.sub(r"\\tag\{([^}]*)\}", r"\\qquad\\text{(\1)}", source)
    try:
        mathml = latex_to_mathml(source, display=display)
        ElementTree.fromstring(mathml)
        if re.search(r"<m[ion][^>]*>\\", mathml):
            raise ValueError("a command is unknown")
    except Exception as error:  # the converter raises its own, IndexError and others on TeX it does not know
        _log.warning("left as TeX: %s (%s: %s)", tex.strip(), type(error).__name__, error)
        return f'<code class="tex">{html.escape(tex.strip())}</code>'
    return _space_like_tex(mathml)


def _space_like_tex(mathml: str) -> str:
    """Spacing that browsers give by the character, TeX by its use: bars, slash, sign, tanh before a letter."""
    mathml = re.sub(
        r"<mo[^>]*>&#x(0007C|02016|0002F);</mo>", r'<mo stretchy="false" lspace="0" rspace="0">&#x\1;</mo>', mathml
    )
    mathml = re.sub(r"<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", mathml)
    mathml = re.sub(r"(&#x0(?:002C|0028|003D|2264);</mo>)<mo>&#x02212;", r'\1<mo form="prefix">&#x02212;', mathml)
    return re.sub(r"(<mi>[A-Za-z]{2,}</mi>)(?=<m(?:i|n|sub|sup|frac|sqrt)\b)", r'\1<mspace width="0.17em" />', mathml)
