"""Write the tables and figures of all pages."""

from __future__ import annotations

from benchmarks.tables import ROOT, pages, render

if __name__ == "__main__":
    for page in pages():
        page.write_text(render(page.read_text()))
        print(f"wrote {page.relative_to(ROOT)}")
