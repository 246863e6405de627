// The page of eval.serve: sends a sentence and the settings, shows the answer.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const threshold = byId("threshold"), capacity = byId("capacity");
  // The right end of the capacity slider means that nothing is dropped.
  const chosenCapacity = () => (!capacity || capacity.value === capacity.max ? null : Number(capacity.value));
  const showSettings = () => {
    if (threshold) byId("threshold-value").textContent = Number(threshold.value).toFixed(2);
    if (capacity) byId("capacity-value").textContent = chosenCapacity() === null ? "no limit" : chosenCapacity().toFixed(2);
  };
  [threshold, capacity].forEach((slider) => slider?.addEventListener("input", showSettings));
  showSettings();

  const dash = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  function showAnswer(answer) {
    byId("translation").textContent = answer.translation;
    byId("cost").textContent = answer.flops === null ? `${answer.milliseconds.toFixed(0)} ms; a dense model`
      : `${answer.milliseconds.toFixed(0)} ms; the MoE layers took ${answer.flops.toFixed(2)} times the FLOPs of dense ones `
        + `(${(answer.moe_flops / 1e6).toFixed(1)} MFLOPs in the search), ${answer.used.toFixed(2)} experts a token`
        + (answer.dropped > 0 ? `; ${(100 * answer.dropped).toFixed(0)}% of the wanted pairs were dropped` : "");
    Explorer.mount(byId("explorer-root"), [answer.sentence]);
    const row = document.createElement("tr");
    const cells = [answer.translation, dash(answer.threshold, 2), answer.capacity === null ? "no limit" : dash(answer.capacity, 2),
      dash(answer.flops, 2), dash(answer.used, 2), answer.milliseconds.toFixed(0)];
    for (const text of cells) row.append(Object.assign(document.createElement("td"), { textContent: text }));
    document.querySelector("#tries tbody").prepend(row);
    byId("tries").hidden = false;
  }

  async function send(event) {
    event.preventDefault();
    byId("error").textContent = "";
    byId("submit").disabled = true;
    byId("cost").textContent = "translating …";
    try {
      const body = { text: byId("text").value, threshold: threshold ? Number(threshold.value) : null, capacity: chosenCapacity() };
      const response = await fetch("translate", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
      });
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error);
      showAnswer(answer);
    } catch (error) {
      byId("cost").textContent = "";
      byId("error").textContent = error instanceof TypeError ? "The server does not answer; is it still running?" : error.message;
    } finally {
      byId("submit").disabled = false;
    }
  }
  byId("form").addEventListener("submit", send);
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); byId("form").requestSubmit(); }
  });
})();
