"""Reports of all-MiniLM-L6-v2 W8A8-full, SmolLM2-135M W4A16-g128 and SmolLM2-135M static, and pictures of them.

    python benchmarks/report_screenshots.py --output DIR [minilm | smollm2-w4 | smollm2-static | RECIPE | ARTIFACT]…

Recipes are run, with their data beside them; of an artifact that is there the report is made without seconds and texts.
Pictures are taken in Chromium by playwright, part by part at two widths, light and dark.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from _common import show_table

import bitlower
from bitlower.tools.recipes.recipe import PassStep, Recipe, load_recipe
from bitlower.tools.runs.flow import RunOptions, run_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = {
    "minilm": ("minilm-w8a8.yaml", "W8A8-full"),
    "smollm2-w4": ("smollm2-w4.yaml", ""),
    "smollm2-static": ("smollm2-static.yaml", ""),
}
"""A recipe of ``examples/``, and the scheme in place of its own."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIEWS = ((1280, "light"), (1280, "dark"), (400, "light"))
TALLEST = 2400
"""Pixels of a picture of one part; longer parts are cut."""


def recipe_of(name: str) -> Recipe:
    """The recipe behind a name or a path, with a report."""
    file, scheme = NAMES.get(name, (name, ""))
    recipe = load_recipe(EXAMPLES / file if name in NAMES else Path(file))
    steps = [
        PassStep(name=step.name, params={**step.params, "scheme": scheme})
        if "scheme" in step.params and scheme
        else step
        for step in recipe.passes
    ]
    return recipe.model_copy(update={"report": True, "passes": steps})


def reports_of(name: str, output: Path) -> list[Path]:
    """The reports of a recipe that is run, one for each artifact, or that of an artifact that is there."""
    if Path(name).is_dir():
        return [bitlower.report(name, output=output / f"{Path(name).resolve().name}.html")]
    folder = output / Path(name).stem
    run_recipe(recipe_of(name), folder, RunOptions(overwrite=True))
    return sorted(folder.rglob("report.html"))


def take_pictures(page_file: Path, output: Path) -> int:
    """Pictures of every part in every view; how many."""
    from playwright.sync_api import sync_playwright

    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    count = 0
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        for width, scheme in VIEWS:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(page_file.resolve().as_uri())
            for place, section in enumerate(page.query_selector_all("section"), 1):
                box = section.bounding_box()
                clip = {"x": 0, "y": box["y"], "width": width, "height": min(box["height"], TALLEST)}
                name = f"{place:02}-{section.get_attribute('id')}-{width}-{scheme}.png"
                page.screenshot(path=output / name, clip=clip, full_page=True)
                count += 1
            page.close()
        browser.close()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(NAMES), help=f"of {', '.join(NAMES)}, recipes or artifacts")
    parser.add_argument("--output", type=Path, required=True, help="a folder for reports and pictures")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.names:
        for report in reports_of(name, arguments.output):
            pictures = arguments.output / f"{Path(name).stem}-pictures" / report.parent.name
            pictures.mkdir(parents=True, exist_ok=True)
            rows.append((name, str(report), report.stat().st_size, take_pictures(report, pictures)))
    show_table(("of", "file", "bytes", "pictures"), rows)


if __name__ == "__main__":
    main()
