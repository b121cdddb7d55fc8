"""The style and the script of the trace's page (trace_page.py). The script writes text only through textContent."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#1c2430;--dim:#6a7686;--line:#e1e6ec;--soft:#eef2f7;--pick:#dcebff;--accent:#2563c4;--bad:#b42331;
--ram:#dceafd;--ramline:#8fb8ef;--rom:#ece2fb;--romline:#b79be3;--mmio:#fdeed8;--mmioline:#e3b36a;--heat:0}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1a2029;--ink:#dde4ec;--dim:#8a97a7;--line:#2b3442;--soft:#222a35;
--pick:#1f3a61;
--accent:#7fb0f5;--bad:#f2808a;--ram:#1c2f4a;--ramline:#3a659f;--rom:#2e2448;--romline:#6d559f;--mmio:#3d2f18;--mmioline:#8d6a30}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:22px 26px 60px;background:var(--bg);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0;letter-spacing:-.01em}h2{font-size:16px;margin:0 0 12px}h3{font-size:13px;margin:0 0 6px}
h2 small{font-weight:400;color:var(--dim);font-size:12.5px;margin-left:8px}
.path{margin:2px 0 12px;color:var(--dim);font:12px ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:16px 0;min-width:0}
.two{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:0 16px}.two section{margin:0}.two{margin:16px 0}
@media(max-width:900px){.two,.events{grid-template-columns:minmax(0,1fr)!important}.two section{margin:8px 0}}
.chips{margin:0 0 10px;display:flex;flex-wrap:wrap;gap:8px}
.chips span{background:var(--card);border:1px solid var(--line);border-radius:999px;padding:2px 12px}
.chips .end{background:var(--accent);border-color:var(--accent);color:var(--card);font-weight:600}.chips .bad{background:var(--bad);
border-color:var(--bad)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0;color:var(--dim);font-size:13px}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}.key b{color:var(--ink)}
.why{border-left:4px solid var(--bad);background:var(--card);border-radius:0 8px 8px 0;padding:10px 14px;margin-top:14px}
.why p{margin:0;font-weight:600;overflow-wrap:anywhere}
pre,table,code{font:12.5px/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,monospace}
pre{margin:8px 0 0;overflow:auto;white-space:pre}summary{cursor:pointer;color:var(--accent)}
.console{background:var(--soft);border-radius:8px;padding:10px 12px;max-height:340px;margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
svg{width:100%;display:block}svg text{fill:var(--dim);font:12px system-ui,"DejaVu Sans",sans-serif}svg .lane{fill:var(--ink)}
.grid{stroke:var(--line);stroke-dasharray:2 3}.base{stroke:var(--line)}#cursor{stroke:var(--ink);stroke-width:1.5;opacity:.7}
#timeline{cursor:crosshair}
table{border-collapse:collapse}td,th{padding:1px 12px 1px 0;text-align:left;white-space:nowrap;vertical-align:top}th{color:var(--dim);
font-weight:500}
.r{text-align:right}.dim,.none{color:var(--dim)}.none{margin:6px 0}
.wide{overflow-x:auto}.sym{color:var(--accent)}
.events{display:grid;grid-template-columns:minmax(0,1fr) 268px;gap:18px}
#filter{width:100%;padding:6px 10px;border:1px solid var(--line);border-radius:7px;background:var(--soft);color:var(--ink);
margin-bottom:8px;font:inherit}
.scroll{max-height:480px;overflow:auto;border:1px solid var(--line);border-radius:7px;outline-offset:-2px}
#events{width:100%}#events thead th{position:sticky;top:0;background:var(--card);border-bottom:1px solid var(--line);padding-top:4px;
padding-bottom:4px}
#events td{padding:2px 12px 2px 0}#events td:first-child,#events th:first-child{padding-left:10px}
#events tbody tr{cursor:pointer}#events tbody tr:hover{background:var(--soft)}#events tr.on{background:var(--pick)!important}
#events .cut td{color:var(--dim);text-align:center;padding:8px;cursor:default}#events td i{display:inline-block;width:8px;height:8px;
border-radius:2px;margin-right:7px}
aside{background:var(--soft);border-radius:8px;padding:12px 14px;align-self:start;overflow-x:auto}aside p{margin:0 0 8px;
overflow-wrap:anywhere}
aside td.changed{color:var(--bad);font-weight:600}aside td:first-child{color:var(--dim)}
.hot .bar{width:110px;min-width:80px}.hot .bar i{display:block;height:9px;border-radius:2px;margin-top:5px;min-width:2px}
.code{columns:2;column-gap:24px}@media(max-width:900px){.code{columns:1}}.fn{break-inside:avoid;margin-bottom:16px;overflow-x:auto}
.fn table{width:100%}.fn h3{color:var(--accent);font-family:ui-monospace,"DejaVu Sans Mono",monospace}.fn .n{min-width:46px;
font-weight:600}
.fn .b{max-width:130px;overflow:hidden;text-overflow:ellipsis}
.fn tr.hit{background:color-mix(in srgb,#e5533d calc(10% + var(--heat)*38%),transparent)}
.map{display:flex;flex-direction:column;gap:3px;margin-bottom:14px}
.block{border:1px solid;border-radius:6px;padding:6px 10px;display:grid;grid-template-columns:1fr auto 70px;gap:2px 14px;
align-items:baseline}
.block em{font-style:normal;color:var(--dim);text-align:right}.ram{background:var(--ram);border-color:var(--ramline)}
.rom{background:var(--rom);border-color:var(--romline)}.mmio{background:var(--mmio);border-color:var(--mmioline)}
.in{grid-column:1/4;height:7px;border-radius:3px;background:color-mix(in srgb,var(--ink) 8%,transparent);position:relative;
overflow:hidden}
.in i{position:absolute;top:0;bottom:0;background:var(--accent)}
.gap{color:var(--dim);font-size:12px;text-align:center}
.tree{margin-top:14px;font:12.5px/1.6 ui-monospace,"DejaVu Sans Mono",monospace;overflow-x:auto;white-space:nowrap;max-height:420px;
overflow-y:auto}
.tree details>div{margin-left:8px;padding-left:14px;border-left:1px solid var(--line)}.tree .leaf{padding-left:17px}
.tree summary{color:var(--ink)}.tree .bad,.bad{color:var(--bad)}.chips .bad{color:var(--card)}.tree code{color:var(--dim)}
"""

SCRIPT = """
"use strict";
const D=JSON.parse(document.getElementById("data").textContent),body=document.querySelector("#events tbody");
const scroll=document.querySelector(".scroll"),side=document.getElementById("registers"),cursor=document.getElementById("cursor");
let chosen=-1,rows=[];
function el(tag,text,cls){const e=document.createElement(tag);if(text!==undefined)e.textContent=text;if(cls)e.className=cls;return e}
function time(ns){if(ns===null)return"";if(ns>=1e9)return(ns/1e9).toFixed(3)+" s";if(ns>=1e6)return(ns/1e6).toFixed(3)+" ms";
return(ns/1e3).toFixed(1)+" \\u00b5s"}
function make(e,i){
  const tr=el("tr");tr.append(el("td",e.n,"r dim"));if(D.cpus>1)tr.append(el("td","cpu"+e.cpu,"dim"));
  if(!D.steps)tr.append(el("td",time(e.t),"r"));
  const at=el("td",e.at+" ");if(e.s)at.append(el("span",e.s,"sym"));if(e.l)at.append(el("span"," "+e.l,"dim"));
  const what=el("td"),dot=el("i");dot.style.background=D.colours[e.k]||"#888";what.append(dot,e.w);
  tr.append(at,el("td",e.i),what);tr.onclick=()=>choose(i);return tr}
function list(){
  const want=document.getElementById("filter").value.toLowerCase().split(/\\s+/).filter(Boolean);
  body.textContent="";rows=[];
  D.events.forEach((e,i)=>{
    if(i===D.first&&D.left_out&&!want.length){
      const tr=el("tr","","cut"),td=el("td","\\u2026 "+D.left_out.toLocaleString("en")+" were left out \\u2026");td.colSpan=6;
tr.append(td);body.append(tr)}
    const text=[e.n,D.cpus>1?"cpu"+e.cpu:"",e.at,e.s,e.l,e.i,e.w,e.k].join(" ").toLowerCase();
    if(want.every(w=>text.includes(w))){const tr=make(e,i);rows.push([i,tr]);body.append(tr)}});
  mark()}
function mark(){for(const[i,tr]of rows)tr.classList.toggle("on",i===chosen)}
function choose(i){
  chosen=i;mark();const e=D.events[i];
  if(cursor&&D.span){const x=D.left+(D.width-D.left-10)*(e.t===null?e.n*1000:e.t)/D.span;cursor.setAttribute("x1",x);
cursor.setAttribute("x2",x)}
  const row=rows.find(r=>r[0]===i);if(row)row[1].scrollIntoView({block:"nearest"});
  side.textContent="";side.append(el("h3",(D.steps?"Instruction ":"Exit ")+e.n+(D.cpus>1?" on vCPU "+e.cpu:"")));
  side.append(el("p",e.w||e.i));
  if(e.kvm)side.append(el("p","in the guest and KVM: "+time(e.kvm),"dim"));
  if(!e.regs){side.append(el("p","Its registers were not kept.","none"));return}
  let before=null;for(let j=i-1;j>=0&&!before;j--)if(D.events[j].regs&&D.events[j].cpu===e.cpu)before=D.events[j].regs;
  const t=el("table");
  D.registers.forEach((name,k)=>{const tr=el("tr"),changed=before&&before[k]!==e.regs[k];
    tr.append(el("td",name),el("td",e.regs[k].padStart(16,"0"),changed?"changed":""));t.append(tr)});
  side.append(t);if(before)side.append(el("p","Red: differs from the event before.","dim"))}
document.getElementById("filter").oninput=list;
scroll.onkeydown=ev=>{const step={ArrowDown:1,ArrowUp:-1}[ev.key];if(!step)return;ev.preventDefault();
  const at=rows.findIndex(r=>r[0]===chosen),next=rows[at<0?0:Math.min(rows.length-1,Math.max(0,at+step))];if(next)choose(next[0])};
const svg=document.getElementById("timeline");
if(svg)svg.onclick=ev=>{const b=svg.getBoundingClientRect(),x=(ev.clientX-b.left)/b.width*D.width,t=(x-D.left)/(D.width-D.left-10)*D.span;
  let best=-1,d=Infinity;D.events.forEach((e,i)=>{const u=e.t===null?e.n*1000:e.t,v=Math.abs(u-t);if(v<d){d=v;best=i}});
if(best>=0)choose(best)};
list();if(D.events.length)choose(0);scroll.scrollTop=0;
"""
