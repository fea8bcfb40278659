// Controls of a lesson on a page without a kernel: the pictures of all positions were made when the lesson ran.
async function live(box) {
  const {controls, start, pictures} = JSON.parse(box.querySelector('script').textContent)
  const packed = new Blob([Uint8Array.from(atob(pictures), c => c.charCodeAt(0))])
  const all = await new Response(packed.stream().pipeThrough(new DecompressionStream('deflate'))).json()
  const at = [...start], picture = box.querySelector('figure'), row = document.createElement('p')
  const show = () => { picture.innerHTML = all[at.reduce((n, i, k) => n * controls[k].values.length + i, 0)] }
  controls.forEach(({name, values, slider}, k) => {
    const label = row.appendChild(document.createElement('label'))
    const input = document.createElement(slider ? 'input' : 'select'), said = document.createElement('output')
    if (slider) Object.assign(input, {type: 'range', min: 0, max: values.length - 1})
    else input.append(...values.map((v, i) => new Option(v, i)))
    input.value = at[k]
    said.value = slider ? values[at[k]] : ''
    input.addEventListener('input', () => {
      at[k] = +input.value
      said.value = slider ? values[at[k]] : ''
      show()
    })
    label.append(name + ' ', input, said)
  })
  box.prepend(row)
  show()
}
document.querySelectorAll('div.live').forEach(live)
