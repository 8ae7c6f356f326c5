"""A page's building blocks and its style: one file, no scripts, nothing from other hosts, light and dark, from 380 pixels of width on.

Arguments named ``html`` are markup; everything else is text and is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paris_ray.pages.charts import escape, expert_colours

CODEC_NOTE = (
    "The pictures are originals as the latent codec gives them back (decoded latents), which is what the experts learn from; it can change colours."
)
"""Goes wherever decoded latents are shown: what looks wrong in them need not be wrong in the originals."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1c1b1a;--muted:#6d6a65;--line:#e3e0da;--good:#167a4a;--bad:#b3372e;
--accent:#2a63b8;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#151514;--card:#1e1e1c;--ink:#eceae6;--muted:#a09c95;--line:#34332f;--good:#5cc48d;--bad:#ef8278;
--accent:#7fb0f5;DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word;
-webkit-text-size-adjust:100%;text-size-adjust:100%}
main{max-width:1060px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:2.1rem;line-height:1.15;margin:0 0 .4rem;letter-spacing:-.02em}
h2{font-size:1.35rem;margin:3.2rem 0 .5rem;letter-spacing:-.01em}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
p{margin:.4rem 0 .9rem;max-width:46rem}
a{color:var(--accent)}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto}
small,.muted,figcaption{color:var(--muted)}small{font-size:max(.85em,12px)}
.lead{font-size:1.08rem;color:var(--muted);margin-bottom:1.4rem}
.none{color:var(--muted);font-style:italic}
.warn{color:var(--bad);font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.88rem;margin:1.2rem 0 0}
nav a{text-decoration:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:1.2rem 0}
.tile,.stage,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:1.55rem;line-height:1.2;letter-spacing:-.02em;font-weight:650}
tr.right td:nth-child(2){color:var(--good);font-weight:650}tr.wrong td:nth-child(2){color:var(--bad);font-weight:650}
.tile span{font-size:.85rem;color:var(--muted)}
.flow{display:flex;flex-wrap:wrap;gap:10px 26px;align-items:stretch;margin:1rem 0}
.stage{position:relative;flex:1 1 128px;min-width:128px;font-size:.85rem;line-height:1.45}
.stage:not(:last-child)::after{content:"\\2192";position:absolute;right:-20px;top:calc(50% - .8em);color:var(--muted);font-size:1.05rem}
.stage b{display:block;font-size:.98rem;margin-bottom:2px}
.stage div{color:var(--muted)}
.stage.off{opacity:.6;border-style:dashed}
.scroll{overflow-x:auto;background:linear-gradient(to left,var(--bg) 45%,transparent) right/40px 100% no-repeat local,
linear-gradient(to left,rgba(128,128,128,.4),transparent) right/12px 100% no-repeat scroll}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin:.6rem 0 1rem}
th{text-align:left;font-weight:600;color:var(--muted);font-size:.8rem;border-bottom:1px solid var(--line);
padding:6px 10px 6px 0;vertical-align:bottom}
td{border-bottom:1px solid var(--line);padding:7px 10px 7px 0;vertical-align:top}
.wide td:first-child,.wide th:first-child{min-width:6.5em;max-width:14em;position:sticky;left:0;background:var(--bg)}
.wide td,.wide th{min-width:4.5em}td.n,th.n{text-align:right}td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
tr.key td{font-weight:650}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px 28px}.two>*{min-width:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:14px}
.card h3{margin:0 0 6px;display:flex;justify-content:space-between;gap:8px}
.card img.sheet{width:100%;border-radius:6px;display:block;margin:6px 0}
.card p{font-size:.84rem;margin:0}
.contact{display:block;max-width:100%}
.term{display:inline-block;border:1px solid var(--line);border-radius:12px;padding:0 10px;margin:2px 4px 2px 0;font-size:.9rem}
details{margin:.6rem 0;font-size:.9rem}summary{cursor:pointer;color:var(--muted)}
.captions{columns:18em;column-gap:24px;margin:.5rem 0;padding-left:2.4em;font-size:.84rem}.captions li{break-inside:avoid}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(148px,1fr));gap:14px 12px}
figure{margin:0}
.pair .two-up{display:flex;gap:4px}
.pair img{width:50%;aspect-ratio:1;border-radius:6px;display:block;background:var(--line)}
.pair figcaption{font-size:.78rem;line-height:1.35;margin-top:4px}
.pair.right .two-up img:first-child{box-shadow:0 0 0 2px var(--good)}
.pair.wrong .two-up img:first-child{box-shadow:0 0 0 2px var(--bad)}
.mark{font-weight:700}.right .mark{color:var(--good)}.wrong .mark{color:var(--bad)}
.gallery td,.gallery th{padding:4px 4px 4px 3px;vertical-align:middle}
.gallery th{font-size:12px;line-height:1.2;font-weight:400;vertical-align:bottom}
.gallery img{width:72px;height:72px;display:block}.gallery img.pixelated{image-rendering:pixelated}
.gallery img.right{outline:2px solid var(--good)}.gallery img.wrong{outline:2px dashed var(--bad)}
.strip{display:flex;flex-wrap:wrap;gap:6px;margin:1.2rem 0 .3rem}
.strip img{width:60px;height:60px;border-radius:8px;display:block}
.route{display:flex;gap:12px;align-items:center}
.route img{width:64px;height:64px;border-radius:8px;flex:none}
.route figcaption{font-size:.8rem;line-height:1.3}
.route>div{flex:1;min-width:0}
.plot{width:100%;display:block;overflow:visible}
.plot text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--muted)}
.plot .label{font-size:14px;font-weight:700;fill:var(--ink);paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .line,.plot .dots{fill:none;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}.plot .line{stroke-width:2}
.lines{padding:0 22px 0 52px;margin:.4rem 0;max-width:720px}
.ends{display:flex;justify-content:space-between;font-size:.78rem;color:var(--muted)}
.bars td{border:0;padding:3px 8px 3px 0;vertical-align:middle;font-size:.84rem;line-height:1.3}.bars td:first-child{min-width:5em;max-width:16em}
.bars td:nth-child(2){width:100%}.bars td:last-child{white-space:nowrap;color:var(--muted);padding-right:0}
.track{position:relative;height:16px;min-width:6em}.track *{position:absolute;height:100%}.track .fill{border-radius:3px;min-width:2px}
.track .tick{border-left:1px solid var(--line)}.track .tick.strong{border-left:2px solid var(--muted);top:-3px;height:22px}
.track .tick.cap{border-left:2px dashed var(--bad);top:-3px;height:22px}
.track .whisker{height:2px;top:7px;opacity:.75}.track .dot{width:10px;height:10px;top:3px;margin-left:-5px;border-radius:5px}
.track .at{font-size:12px;color:var(--muted);transform:translateX(-50%);line-height:16px;white-space:nowrap}
.shares{display:flex;gap:2px;height:26px;margin:.4rem 0}
.shares i{overflow:hidden;border-radius:2px;min-width:1px;text-align:center;
font:600 12px/26px system-ui,sans-serif;color:#fff;text-shadow:0 0 3px #000}
.legend{display:flex;flex-wrap:wrap;gap:3px 14px;font-size:.82rem;color:var(--muted);margin:.3rem 0 .8rem}
.legend i,.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:5px;vertical-align:-1px}
@media (min-width:700px){.bars td:first-child{white-space:nowrap}}
@media (max-width:560px){main{padding:24px 16px 60px}h1{font-size:1.7rem}.contact{max-width:600px}.stage::after{display:none}
.wide td:first-child,.wide th:first-child{max-width:9em}}
"""


def page(title: str, html: str, experts: int) -> str:
    """The whole document."""
    light, dark = expert_colours(experts)
    style = STYLE.replace("LIGHT", _variables(light)).replace("DARK", _variables(dark))
    style += "".join(f".f{k}{{fill:var(--e{k})}}.g{k}{{background:var(--e{k})}}.s{k}{{stroke:var(--e{k})}}" for k in range(experts))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{html}</main></body></html>\n"
    )


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--e{k}:{colour};" for k, colour in enumerate(colours))


def section(anchor: str, title: str, html: str) -> str:
    """A titled part that the navigation can jump to."""
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>{html}</section>'


def navigation(parts: Iterable[tuple[str, str]]) -> str:
    """Links to sections: (anchor, title)."""
    return "<nav>" + "".join(f'<a href="#{escape(anchor)}">{escape(title)}</a>' for anchor, title in parts) + "</nav>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    css = f' class="{escape(kind)}"' if kind else ""
    return f"<p{css}>{escape(text)}</p>"


def absent(text: str) -> str:
    """What stands where a part of the run is missing."""
    return paragraph(text, "none")


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Headline figures: (figure, what it is)."""
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in items) + "</div>"


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = (), key: Sequence[int] = (), kinds: Sequence[str] = ()
) -> str:
    """A table of text. One that is too wide scrolls under its first column.

    Args:
        header: of its columns.
        rows: their cells.
        numeric: columns that are set right.
        key: rows that stand out.
        kinds: of each row ``right`` or ``wrong``, which colours its second cell, or nothing.
    """
    css = {i: f" class={kind}" for i, kind in enumerate(kinds) if kind} | dict.fromkeys(key, " class=key")

    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(f"<{tag}{' class=n' if i in numeric else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr{css.get(i, '')}>{cells('td', row)}</tr>" for i, row in enumerate(rows))
    return f'<div class="scroll"><table class="wide"><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'


def image(uri: str, text: str, kind: str = "") -> str:
    """A picture with its description; pass only data URIs."""
    css = f' class="{escape(kind)}"' if kind else ""
    return f'<img src="{escape(uri)}" alt="{escape(text)}"{css}>'
