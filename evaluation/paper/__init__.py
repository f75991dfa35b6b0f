"""The paper's comparisons in one run: the recipe, its conditions, their results, the page and its plots."""
