"use strict";
// Pictures of two sets over one another: the line between them follows mouse, finger or arrow keys.
(() => {
  const root = document.querySelector(".compare");
  const dialog = document.querySelector(".large");
  const pairs = [...root.querySelectorAll(".stage")];
  const choices = [...root.querySelectorAll("select")];
  let shown = 0;
  root.classList.add("live");

  const cut = (stage, percent) => {
    stage.style.setProperty("--cut", `${percent}%`);
    const slider = stage.querySelector("input");
    slider.value = percent;
    slider.setAttribute("aria-valuetext", `${Math.round(percent)} % ${sideName(0)}`);
  };
  const sideName = (side) => choices[side].selectedOptions[0].textContent;

  const choose = () => {
    for (const image of document.querySelectorAll(".stage img")) {
      image.classList.toggle("left", image.dataset.set === choices[0].value);
      image.classList.toggle("right", image.dataset.set === choices[1].value);
    }
    document.querySelectorAll(".stage").forEach((stage) => cut(stage, 50));
  };

  const watch = (stage, onClick) => {
    const slider = stage.querySelector("input");
    slider.addEventListener("input", () => cut(stage, +slider.value));
    slider.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "mouse") return;
      const box = slider.getBoundingClientRect();
      cut(stage, Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width)));
    });
    slider.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && cut(stage, 50));
    slider.addEventListener("click", (event) => event.pointerType === "mouse" && onClick());
    slider.addEventListener("keydown", (event) => {
      if (event.key === "Enter") onClick();
      if (event.key === " ") { event.preventDefault(); cut(stage, +slider.value < 50 ? 100 : 0); }
    });
  };

  const large = dialog.querySelector(".stage");
  const enlarge = (number) => {
    shown = (number + pairs.length) % pairs.length;
    large.querySelectorAll("img").forEach((image) => image.remove());
    for (const image of pairs[shown].querySelectorAll("img")) large.prepend(image.cloneNode());
    dialog.querySelector(".title").textContent =
      `Picture ${shown + 1} of ${pairs.length}; left ${sideName(0)}, right ${sideName(1)}`;
    cut(large, 50);
    if (!dialog.open) dialog.showModal();
    large.querySelector("input").focus();
  };

  pairs.forEach((stage, number) => {
    watch(stage, () => enlarge(number));
    stage.parentElement.querySelector("button").addEventListener("click", () => enlarge(number));
  });
  watch(large, () => dialog.close());
  dialog.querySelector(".before").addEventListener("click", () => enlarge(shown - 1));
  dialog.querySelector(".after").addEventListener("click", () => enlarge(shown + 1));
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => pairs[shown].querySelector("input").focus());
  choices.forEach((choice) => choice.addEventListener("change", choose));
  choose();
})();
