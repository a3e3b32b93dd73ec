"""How the picture of a plan looks, by day and by night."""

from __future__ import annotations

_LIGHT = "--paper:#ffffff;--ink:#1c2430;--dim:#5d6877;--line:#e3e7ec;--track:#f3f5f8;--hot:#d1242f;--soft:#fff1f0;"
_DARK = "--paper:#12161c;--ink:#e6eaf0;--dim:#98a3b3;--line:#2a323d;--track:#1b212a;--hot:#ff6b66;--soft:#3a1d1f;"
_LIGHT_HUES = ("#2f6fdb", "#c2630a", "#1a8a5a", "#8b46c9", "#0f8799", "#b4337a", "#7a7512", "#51606f")
_DARK_HUES = ("#5b93f0", "#e08a3c", "#3fb57f", "#b07be6", "#3cb3c5", "#e066a3", "#b5ae3b", "#8b9aab")


def _hues(colours: tuple[str, ...]) -> str:
    return "".join(f".hue{n}{{--hue:{colour}}}" for n, colour in enumerate(colours))


STYLE = f"""
:root{{{_LIGHT}color-scheme:light dark}}{_hues(_LIGHT_HUES)}.client{{--hue:var(--dim)}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}{_hues(_DARK_HUES)}}}
body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,"DejaVu Sans",sans-serif}}
main{{max-width:1180px;margin:0 auto;padding:24px 20px 60px}}
h1{{font-size:24px;margin:0}}h2{{font-size:17px;margin:32px 0 8px}}
.dim,.small{{color:var(--dim);fill:var(--dim)}}.dim{{margin:2px 0 16px}}
.tiles{{display:flex;flex-wrap:wrap;gap:12px}}
.tile{{flex:1 1 200px;border:1px solid var(--line);border-radius:8px;padding:10px 14px}}
.tile b{{display:block;font-size:22px}}.tile span{{color:var(--dim);font-size:13px}}
.limit,.change{{border-left:4px solid var(--hot);background:var(--soft);padding:8px 12px;border-radius:4px}}
.change{{border-color:var(--dim);background:var(--track)}}
.picture{{overflow-x:auto;border:1px solid var(--line);border-radius:8px;padding:8px 0}}
svg{{display:block;min-width:860px;width:100%;height:auto}}
svg text{{font-size:11px;fill:var(--ink)}}svg text.small{{font-size:10px;fill:var(--dim)}}
svg text.region{{font-size:13px;font-weight:700}}svg text.name{{font-size:12px;font-weight:600}}
svg text.inside{{fill:#fff;font-size:11px;font-weight:600;pointer-events:none}}
.grid,.rule{{stroke:var(--line);stroke-width:1}}.track{{fill:var(--track)}}
.bar{{fill:color-mix(in srgb,var(--hue) 62%,var(--paper))}}.busy{{fill:var(--hue)}}
.limits{{fill:none;stroke:var(--hot);stroke-width:2.5}}.client rect,rect.client{{fill:var(--dim)}}
.ribbon{{fill:none;stroke:var(--hue);stroke-opacity:.42}}.ribbon:hover{{stroke-opacity:.85}}
.limiting{{stroke:var(--hot);stroke-opacity:.7}}
.legend{{color:var(--dim);font-size:13px}}.key{{display:block;margin:4px 0}}
.key i{{display:inline-block;width:30px;height:12px;border-radius:3px;margin-right:8px;vertical-align:-1px}}
.sample{{background:linear-gradient(90deg,var(--hue) 60%,color-mix(in srgb,var(--hue) 62%,var(--paper)) 60%)}}
.ribbonkey{{background:var(--hue);opacity:.42}}.limitkey{{border:2.5px solid var(--hot);box-sizing:border-box}}
table{{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}}
th{{text-align:left;color:var(--dim);font-weight:600}}
th,td{{padding:4px 10px 4px 0;border-bottom:1px solid var(--line)}}
.number{{text-align:right}}tr.hot td{{color:var(--hot);font-weight:600}}
"""
