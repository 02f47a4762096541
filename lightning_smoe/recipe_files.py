"""Recipes that are files of their own, found by a path or by a bare name."""

import difflib
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lightning_smoe.compression.recipe import Recipe
from lightning_smoe.errors import InputError

# In the working folder, and in the checkout that an editable installation runs from.
_SHELVES = (Path("configs/recipe"), Path(__file__).parents[1] / "configs" / "recipe")


def find_recipe(name: str, configs: Sequence[Path] = ()) -> Path:
    """Finds a recipe's file.

    Args:
        name: A path that ends in .yaml, or a bare NAME: the file recipe/NAME.yaml beside an
            experiment file, else configs/recipe/NAME.yaml in the working folder, else that of the
            checkout that this package runs from.
        configs: Experiment files.

    Raises:
        InputError: There is no such file.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise InputError(f"--recipes {name}: there is no such file")
        return Path(name)
    shelves = [config.parent / "recipe" for config in configs] + list(_SHELVES)
    for shelf in shelves:
        if (shelf / f"{name}.yaml").is_file():
            return shelf / f"{name}.yaml"
    there = sorted({path.stem for shelf in shelves for path in shelf.glob("*.yaml")})
    near = difflib.get_close_matches(name, there, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(there) or 'none'}"
    raise InputError(
        f"--recipes {name}: there is no {name}.yaml in {', '.join(map(str, shelves))}{hint}"
    )


def read_recipe(path: Path) -> Recipe:
    """Reads a file that holds what `model.recipe` takes: class_path and init_args.

    Raises:
        InputError: It is not YAML, or describes no recipe.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=Recipe, required=True)
    try:
        stored: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe = parser.instantiate_classes(parser.parse_object({"recipe": stored})).recipe
    except (ArgumentError, OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not a recipe: {error}") from error
    if not isinstance(recipe, Recipe):
        raise InputError(f"{path} is not a recipe; it needs the keys class_path and init_args")
    return recipe


def read_recipes(files: Sequence[Path]) -> dict[str, Recipe]:
    """Reads recipes, named by their files.

    Raises:
        InputError: A file describes no recipe, or two have the same name.
    """
    recipes: dict[str, Recipe] = {}
    for path in files:
        if path.stem in recipes:
            raise InputError(f"--recipes: two are named {path.stem}; rename a file")
        recipes[path.stem] = read_recipe(path)
    return recipes
